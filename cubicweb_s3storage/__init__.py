"""CubicWeb storage that keeps Bytes attributes in an S3 bucket."""
