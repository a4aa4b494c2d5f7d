"""What a transformers model holds: its blocks, linears and fused experts, found and not listed by architecture."""
