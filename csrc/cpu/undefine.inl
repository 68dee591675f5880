// Clears the macros of instructions.inl for the next instruction set.
#undef VQOPS_NAME
#undef VQOPS_WIDTH
#undef VQOPS_TILE
#undef VQOPS_CODES
#undef VQOPS_PAIRS
#undef VQOPS_BROADCAST
#undef VQOPS_LANES
#undef VQOPS_LESS_EQUAL
#undef VQOPS_ANY
#undef VQOPS_BITS
#undef VQOPS_SUBTRACT_PRODUCT
#undef VQOPS_LOAD_SOME
#undef VQOPS_DIRECT
#undef VQOPS_GROUP
#undef VQOPS_ADD_PAIRS
