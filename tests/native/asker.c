/* Who asks for metrics, without Python, for the sanitizers: answered, left, cut off and ended. Exit status 0. */
#define _GNU_SOURCE
#include "asker.h"
#include "holds.h"

#include <arpa/inet.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#define CONNECTIONS 2u
#define ANSWERS 20u
#define PERIOD_NS 2000000u
#define DEADLINE_SECONDS 60u

static int listening, ending;
static struct sockaddr_in address = {.sin_family = AF_INET};

/* The agent: answers some questions on a connection, with more than a status, and closes it. */
static void *answer(void *argument) {
    static const char good[] = "HTTP/1.1 200 OK\r\n\r\n", bad[] = "HTTP/1.1 500 No\r\n\r\n";
    char body[40000] = {0}, question[64];
    (void)argument;
    int connection = accept(listening, NULL, NULL);
    HOLDS(connection >= 0);
    for (unsigned count = 0; count < ANSWERS; count++) {
        const char *status = count % 2 ? bad : good;
        HOLDS(recv(connection, question, sizeof question, 0) > 0);
        memcpy(body, status, strlen(status));
        HOLDS(send(connection, body, sizeof body, MSG_NOSIGNAL) == (ssize_t)sizeof body);
    }
    HOLDS(!close(connection));
    return NULL;
}

static int dial(void) {
    int connection = socket(AF_INET, SOCK_STREAM, 0);
    HOLDS(connection >= 0 && !connect(connection, (struct sockaddr *)&address, sizeof address));
    return connection;
}

int main(void) {
    socklen_t length = sizeof address;
    pthread_t agents[CONNECTIONS];
    int connections[CONNECTIONS];
    alarm(DEADLINE_SECONDS);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    listening = socket(AF_INET, SOCK_STREAM, 0);
    ending = eventfd(0, 0);
    HOLDS(listening >= 0 && ending >= 0 && !bind(listening, (struct sockaddr *)&address, sizeof address));
    HOLDS(!listen(listening, CONNECTIONS) && !getsockname(listening, (struct sockaddr *)&address, &length));
    for (unsigned i = 0; i < CONNECTIONS; i++) {
        HOLDS(!pthread_create(&agents[i], NULL, answer, NULL));
        connections[i] = dial();
    }
    struct asker asker = {
        .connections = connections, .count = CONNECTIONS, .ending = ending, .period_ns = PERIOD_NS, .window_ns = 0};
    for (unsigned ended = 0; ended < CONNECTIONS; ended++) {
        int index = asker_run(&asker);
        HOLDS(index == 0 || index == 1);
        HOLDS(!close(connections[index]));
        connections[index] = dial(); /* nobody accepts it, so nothing is answered on it */
        asker.unanswered &= ~(UINT64_C(1) << index);
    }
    HOLDS(asker.answers >= ANSWERS / 2 && asker.answers <= CONNECTIONS * ANSWERS / 2);
    HOLDS(!eventfd_write(ending, 1));
    HOLDS(asker_run(&asker) == (int)CONNECTIONS);
    for (unsigned i = 0; i < CONNECTIONS; i++)
        HOLDS(!pthread_join(agents[i], NULL) && !close(connections[i]));
    HOLDS(!close(listening) && !close(ending));
    puts("ok");
    return 0;
}
