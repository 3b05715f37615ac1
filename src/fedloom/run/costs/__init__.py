"""What a run costs, foreseen and measured: bytes, operations, memory, time on simulated devices."""
