"""Stage 2, deploy: what a lot is worth to this device, what to bid for, who has won. Pure."""
