"""Units of any model from its traced graph: labels of dimensions, and the operators that equate them."""
