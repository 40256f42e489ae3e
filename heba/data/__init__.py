"""What decides numbers: splits, images, prompts, protocols and the table of data sets."""
