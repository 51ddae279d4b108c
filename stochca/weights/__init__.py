"""Weights of Vision Transformers: files in the layouts of others, timm models made of them, and back."""
