"""The engine in the shapes of other libraries: see docs/integrations.md."""
