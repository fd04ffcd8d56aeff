"""What the data is: words, shapes and tables. Standard library and pyarrow only."""
