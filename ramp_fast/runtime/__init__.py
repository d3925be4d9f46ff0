"""Plans on images: forward pass and pull-back, groups of images, and on GPUs recordings and copies."""
