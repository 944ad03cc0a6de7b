"""Surgery on pretrained transformers models: where they open, what is put in, how it is undone."""
