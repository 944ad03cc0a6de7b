"""What of an image or a clip is shown to a model, from where attention went.

`show(maps, ..., **options)` is called: it returns a mask, a box, a point or a window, and loads no image.
"""
