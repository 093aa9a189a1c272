"""A task's data: from rows of files to packed rows of token ids."""
