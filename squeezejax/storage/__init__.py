"""Trees as files, and our pytrees in exported programs."""
