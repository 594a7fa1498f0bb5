"""How weights move: the arena, discovery, and the engines for torch and ONNX Runtime."""
