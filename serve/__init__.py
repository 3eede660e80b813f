"""How models answer: engines, the gateway and the Ray Serve applications around them."""
