"""What a KVM guest's vCPUs run: the whole program, assembled by hand for long mode, an instruction a line.

In: nothing. Out: its bytes, and where each label of it is. Each line holds the bytes, what a disassembler says to them
(a test asks one), and what they are for. The program does what content.h and workload.h say, so that the
same check judges both kinds of guest; it has no stack, takes no interrupts, and touches nothing but its vCPU's block
(kvm.h, at rbx), its vCPU's window (kvm.h, at rsi), and the pages that it visits.

    r8 steps made    r9 place in the pass    r10 page that comes next in order    r11 pass    r15 end of the last step
    rax, rcx, rdx, rdi, rbp, r12, r13 scratch    r14 where `mix` goes back to
"""

from __future__ import annotations

LISTING = """
step:
    4c 3b 46 08           | cmp r8,QWORD PTR [rsi+0x8]          | has this vCPU made as many steps as it may for now?
    0f 83 3c 01 00 00     | jae call                            | then it calls the host
pick:
    4c 89 d0              | mov rax,r10                         | the page that comes next in order
    f6 83 a0 00 00 00 01  | test BYTE PTR [rbx+0xa0],0x1        | but in random order
    74 32                 | je visit                            | this is it
    4c 89 c8              | mov rax,r9                          | the place in the pass, scattered: permutation_at()
again:
    48 8d 7b 70           | lea rdi,[rbx+0x70]                  | the rounds of this pass
    8b 4b 68              | mov ecx,DWORD PTR [rbx+0x68]        | by how much each shifts
    ba 03 00 00 00        | mov edx,0x3                         | three of them
round:
    48 03 07              | add rax,QWORD PTR [rdi]             | add …
    48 0f af 47 08        | imul rax,QWORD PTR [rdi+0x8]        | … multiply …
    48 23 43 60           | and rax,QWORD PTR [rbx+0x60]        | … within the bits …
    48 89 c5              | mov rbp,rax                         | … and let what was carried up
    48 d3 ed              | shr rbp,cl                          | come down
    48 31 e8              | xor rax,rbp                         | to the low ones
    48 83 c7 10           | add rdi,0x10                        | the next round's numbers
    ff ca                 | dec edx                             | one round less
    75 e3                 | jne round                           | until all are done
    48 3b 43 18           | cmp rax,QWORD PTR [rbx+0x18]        | still beyond the pages?
    73 d1                 | jae again                           | then once more: walk the cycle
visit:
    48 8d 50 01           | lea rdx,[rax+0x1]                   | page + 1 …
    48 0f af 53 40        | imul rdx,QWORD PTR [rbx+0x40]       | … times the generator's step …
    48 03 53 08           | add rdx,QWORD PTR [rbx+0x8]         | … from the key of the content
    4c 8d 35 05 00 00 00  | lea r14,[based]                     | come back to `based`
    e9 4e 01 00 00        | jmp mix                             | rdx = the page's base: content_base()
based:
    48 c1 e0 0c           | shl rax,0xc                         | the page's offset
    48 03 43 10           | add rax,QWORD PTR [rbx+0x10]        | and address
    48 89 d1              | mov rcx,rdx                         | the base …
    48 c1 c1 15           | rol rcx,0x15                        | … turned …
    48 03 4b 30           | add rcx,QWORD PTR [rbx+0x30]        | … with what this vCPU adds to it …
    48 83 c9 01           | or rcx,0x1                          | … made odd: content_addend()
    03 53 38              | add edx,DWORD PTR [rbx+0x38]        | the base and this vCPU's number …
    81 e2 ff 01 00 00     | and edx,0x1ff                       | … say which word is its own: content_lane()
    f6 83 a0 00 00 00 02  | test BYTE PTR [rbx+0xa0],0x2        | increment?
    75 06                 | jne byte                            | that touches a byte
    48 01 0c d0           | add QWORD PTR [rax+rdx*8],rcx       | THE VISIT: one instruction, one fault for writing
    eb 03                 | jmp visited                         | past the other kind
byte:
    fe 04 d0              | inc BYTE PTR [rax+rdx*8]            | THE VISIT of increment
visited:
    49 ff c0              | inc r8                              | a step is done
    4c 89 03              | mov QWORD PTR [rbx],r8              | counted in memory that migrates
    4c 89 06              | mov QWORD PTR [rsi],r8              | and where the host can see it without touching that
    0f 31                 | rdtsc                               | the end of this step is the beginning of the next
    48 c1 e2 20           | shl rdx,0x20                        | rdx:rax was the time stamp …
    48 09 c2              | or rdx,rax                          | … rdx is it now
    48 89 d0              | mov rax,rdx                         | how long
    4c 29 f8              | sub rax,r15                         | since the last one
    48 3b 46 10           | cmp rax,QWORD PTR [rsi+0x10]        | as long as a stall?
    0f 83 98 00 00 00     | jae stalled                         | then it is recorded
clocked:
    49 89 d7              | mov r15,rdx                         | remember when this step ended
    4c 03 53 20           | add r10,QWORD PTR [rbx+0x20]        | on by the stride
    4c 3b 53 18           | cmp r10,QWORD PTR [rbx+0x18]        | beyond the last page?
    72 04                 | jb onward                           | not yet
    4c 2b 53 18           | sub r10,QWORD PTR [rbx+0x18]        | begin again, where the stride leads to
onward:
    49 ff c1              | inc r9                              | the next place in the pass
    4c 3b 4b 18           | cmp r9,QWORD PTR [rbx+0x18]         | was that the last?
    0f 82 2d ff ff ff     | jb step                             | no
    45 31 c9              | xor r9d,r9d                         | the pass is over: place 0 …
    49 ff c3              | inc r11                             | … of the next
    f6 83 a0 00 00 00 01  | test BYTE PTR [rbx+0xa0],0x1        | do passes differ?
    0f 84 1a ff ff ff     | je step                             | only in random order
    49 8d 53 01           | lea rdx,[r11+0x1]                   | pass + 1 …
    48 0f af 53 40        | imul rdx,QWORD PTR [rbx+0x40]       | … times the generator's step …
    48 03 53 58           | add rdx,QWORD PTR [rbx+0x58]        | … from the key of this vCPU's order
    4c 8d 35 05 00 00 00  | lea r14,[keyed]                     | come back to `keyed`
    e9 b0 00 00 00        | jmp mix                             | rdx = the key of this pass
keyed:
    49 89 d5              | mov r13,rdx                         | kept
    48 8d 7b 70           | lea rdi,[rbx+0x70]                  | where its numbers go
    b8 03 00 00 00        | mov eax,0x3                         | for three rounds
draw:
    4c 03 6b 40           | add r13,QWORD PTR [rbx+0x40]        | number after number of the key's stream
    4c 89 ea              | mov rdx,r13                         | through the generator
    4c 8d 35 05 00 00 00  | lea r14,[addend]                    | come back to `addend`
    e9 91 00 00 00        | jmp mix                             | mix it
addend:
    48 89 17              | mov QWORD PTR [rdi],rdx             | what the round adds
    4c 03 6b 40           | add r13,QWORD PTR [rbx+0x40]        | the next number
    4c 89 ea              | mov rdx,r13                         | through the generator
    4c 8d 35 02 00 00 00  | lea r14,[factor]                    | come back to `factor`
    eb 7e                 | jmp mix                             | mix it
factor:
    48 83 ca 01           | or rdx,0x1                          | odd, or it would lose bits
    48 89 57 08           | mov QWORD PTR [rdi+0x8],rdx         | what the round multiplies by
    48 83 c7 10           | add rdi,0x10                        | the next round
    ff c8                 | dec eax                             | one less
    75 ca                 | jne draw                            | until all are drawn
    e9 ba fe ff ff        | jmp step                            | the first step of the pass
call:
    e6 e9                 | out 0xe9,al                         | the host hears of it, and may let this vCPU rest here
    e9 b3 fe ff ff        | jmp step                            | and goes on with the comparison
stalled:
    49 89 d4              | mov r12,rdx                         | the time stamp, saved
    48 89 d0              | mov rax,rdx                         | the time stamp
    48 8b 4e 20           | mov rcx,QWORD PTR [rsi+0x20]        | when the host last let this vCPU go on
    4c 39 f9              | cmp rcx,r15                         | was that before the last step's end?
    49 0f 42 cf           | cmovb rcx,r15                       | then that is the beginning
    48 29 c8              | sub rax,rcx                         | ticks since
    72 44                 | jb unrecorded                       | a clock that went back tells nothing
    48 f7 66 18           | mul QWORD PTR [rsi+0x18]            | to nanoseconds, with 32 bits behind the point
    48 0f ac d0 20        | shrd rax,rdx,0x20                   | shifted to whole ones
    48 3d e8 03 00 00     | cmp rax,0x3e8                       | still a microsecond, without the host's own pause?
    72 33                 | jb unrecorded                       | no stall
    48 0f bd c8           | bsr rcx,rax                         | the octave: hist_index()
    ba 7f 04 00 00        | mov edx,0x47f                       | the last bucket …
    83 f9 27              | cmp ecx,0x27                        | … if it is longer than 18 minutes
    77 0e                 | ja counted                          | it is
    83 e9 05              | sub ecx,0x5                         | 32 buckets an octave
    48 89 c2              | mov rdx,rax                         | the nanoseconds …
    48 d3 ea              | shr rdx,cl                          | … their upper six bits …
    c1 e1 05              | shl ecx,0x5                         | … beyond the buckets …
    01 ca                 | add edx,ecx                         | … of the octaves below
counted:
    48 ff 44 d6 58        | inc QWORD PTR [rsi+rdx*8+0x58]      | one more in its bucket
    48 01 46 48           | add QWORD PTR [rsi+0x48],rax        | the sum
    48 3b 46 50           | cmp rax,QWORD PTR [rsi+0x50]        | the longest?
    76 04                 | jbe shorter                         | no
    48 89 46 50           | mov QWORD PTR [rsi+0x50],rax        | it is now
shorter:
    48 ff 46 40           | inc QWORD PTR [rsi+0x40]            | the count
unrecorded:
    4c 89 e2              | mov rdx,r12                         | the time stamp again
    e9 06 ff ff ff        | jmp clocked                         | and on
mix:
    48 89 d1              | mov rcx,rdx                         | the generator's finaliser: mix()
    48 c1 e9 1e           | shr rcx,0x1e                        | its upper bits
    48 31 ca              | xor rdx,rcx                         | come down
    48 0f af 53 48        | imul rdx,QWORD PTR [rbx+0x48]       | first factor
    48 89 d1              | mov rcx,rdx                         | again
    48 c1 e9 1b           | shr rcx,0x1b                        | the upper bits
    48 31 ca              | xor rdx,rcx                         | come down
    48 0f af 53 50        | imul rdx,QWORD PTR [rbx+0x50]       | second factor
    48 89 d1              | mov rcx,rdx                         | and again
    48 c1 e9 1f           | shr rcx,0x1f                        | the upper bits
    48 31 ca              | xor rdx,rcx                         | come down
    41 ff e6              | jmp r14                             | back to whoever jumped here
"""

CALL_PORT = 0xE9


def _assemble() -> tuple[bytes, dict[str, int]]:
    """Return the program's bytes and the offset of each label."""
    program, labels = bytearray(), {}
    for line in LISTING.strip().splitlines():
        if line.endswith(":"):
            labels[line.removesuffix(":")] = len(program)
        else:
            program += bytes.fromhex(line.partition("|")[0])
    return bytes(program), labels


PROGRAM, LABELS = _assemble()
