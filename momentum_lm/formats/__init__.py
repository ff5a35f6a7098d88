"""Files of models: read safely, whoever wrote them."""
