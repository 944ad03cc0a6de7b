"""Keys and values as codes on a GPU: written and read without ever being decoded."""
