"""Made pictures with what is in them: pages of text for OCR, and charts with their tables."""
