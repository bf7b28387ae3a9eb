"""The seed paper's GAN and the DCGAN it starts from: presets `stgan-lite` and `dcgan-base`, kept for comparison."""
