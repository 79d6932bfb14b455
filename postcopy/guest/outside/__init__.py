"""An outside VMM: a process that keeps its memory and hands over the userfaultfd by which its faults are told."""
