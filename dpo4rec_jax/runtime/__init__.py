"""What every computation runs on: devices, state, optimizer, checkpoints, data feed, progress."""
