"""Changes of a model's weights that keep its function, made before quantizing, and how a block's parts are observed."""
