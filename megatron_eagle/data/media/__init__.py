"""Bytes of images and videos -> pixels, and the arithmetic of tiles and frames."""
