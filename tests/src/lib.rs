//! Whole VMs on real KVM, two agents, faults.
