"""Fine-tunes a small ViT on scikit-learn's digits: plain, with StochCA, and with controls."""
