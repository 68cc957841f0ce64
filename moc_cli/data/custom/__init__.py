"""A person's own rows: files, columns, formats, and chats as their templates write them."""
