"""What commands show: tables, numbers, pictures, progress."""
