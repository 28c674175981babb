"""What several formats share, none of it a format: integers in groups, kinds of scales."""
