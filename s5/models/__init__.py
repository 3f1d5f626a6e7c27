"""Every `nn.Module`: selection, mixers, blocks, decoders, backbone, video model."""
