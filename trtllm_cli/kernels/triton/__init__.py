"""Device code in Triton, one file a concept. The lowering says how each kernel is launched."""
