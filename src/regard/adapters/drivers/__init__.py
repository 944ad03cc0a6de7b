"""Ways of generating that no mechanism can express, because they run backward between tokens."""
