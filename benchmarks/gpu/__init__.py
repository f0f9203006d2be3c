"""``make gpu``: every measurement that needs a GPU, in parts that can be resumed, and one Markdown page of them."""
