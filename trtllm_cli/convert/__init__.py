"""From a Hugging Face snapshot or a GGUF file to a checkpoint, tensor by tensor."""
