/* What must hold in a program for the sanitizers: where it does not, its line is said and the program ends. */
#ifndef POSTCOPY_TESTS_HOLDS_H
#define POSTCOPY_TESTS_HOLDS_H

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HOLDS(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "line %d: %s: %s\n", __LINE__, #condition, strerror(errno));                               \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

#endif
