"""A token's journey: request, scheduler, plan, decoder, dispatch, frames.

No sockets and no ONNX Runtime here: they come in through `ports`.
"""
