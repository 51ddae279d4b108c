"""A trained target in forms that others run: timm's folder, ONNX, `torch.export`, the Hugging Face hub."""
