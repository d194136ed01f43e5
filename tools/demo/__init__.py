"""How the demo checkpoint was made and is judged: drawings of colored shapes, training, a reader of pixels."""
