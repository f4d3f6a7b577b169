"""Exporting, publishing and loading models: Hub repositories, model cards, Spaces, ONNX."""
