"""What a training step does besides its one matrix product. `native` (compiled) and `portable` (torch) do the same."""
