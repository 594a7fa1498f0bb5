module vram.dev/tests/cluster/forward

go 1.24.0
