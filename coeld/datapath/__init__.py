"""A token's journey: request, scheduler, plan, decoder, dispatch, frames. No sockets, no ONNX Runtime."""
