"""How fast a compiled Triton kernel would be, read from its machine code: a prediction for a GPU that is not here.

sass reads the instructions, flow finds the loops and the path of a tile, pipes says what an instruction takes of which
unit, model issues the instructions of the warps that share a scheduler, predict turns cycles into times. gcn does what
sass and pipes do for AMD's GPUs.
"""
