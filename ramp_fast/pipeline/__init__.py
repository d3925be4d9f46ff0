"""Whole data sets through an engine into a store of maps: decoded ahead, computed, written beside the computation."""
