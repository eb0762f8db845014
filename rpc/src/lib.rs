//! Agents, VMM processes and the command line.
