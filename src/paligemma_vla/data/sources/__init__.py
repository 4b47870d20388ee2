"""Foreign formats, one file each: read and write episodes."""
