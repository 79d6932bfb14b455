/* Filling the guest's memory and checking it. In: visits of each vCPU. Out: pages that are not what they must be. */
#define _GNU_SOURCE
#include "check.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Where one vCPU stands, and how often it visited each page in its pass under way. */
struct visits {
    uint64_t pass;
    uint32_t *partial; /* [active_pages] */
};

struct check {
    const struct memory *memory;
    const struct content *content;
    const struct order *order;
    uint32_t *weights; /* [active_pages], visits of a whole pass */
    struct visits vcpu[];
};

/* The increment workload's property, kept while pages go by in order, for one vCPU. */
struct descent {
    bool begun;
    bool stepped;
    uint8_t byte;
};

static void page_pattern(const struct content *content, uint64_t page, uint64_t *words) {
    uint64_t base = content_base(content, page);
    for (uint32_t i = 0; i < GUEST_PAGE_WORDS; i++)
        words[i] = stream(base, i);
    for (uint32_t v = 0; content->bytes && v < content->vcpus; v++)
        *(uint8_t *)&words[content_lane(base, v)] = content_first_byte(content, v);
}

void memory_fill(const struct memory *memory, const struct content *content) {
    uint64_t words[GUEST_PAGE_WORDS];
    for (uint64_t page = 0; page < memory->active_pages; page++) {
        page_pattern(content, page, words);
        memcpy(memory_at(memory, page), words, sizeof words);
    }
    for (uint64_t page = memory->active_pages + memory->hole_pages; page < memory->pages; page++)
        memset(memory_at(memory, page), 0, GUEST_PAGE_BYTES);
}

int check_create(const struct memory *memory, const struct content *content, const struct order *order,
                 struct check **out) {
    struct check *check = calloc(1, sizeof *check + content->vcpus * sizeof check->vcpu[0]);
    if (check == NULL)
        return ENOMEM;
    check->memory = memory;
    check->content = content;
    check->order = order;
    check->weights = calloc(memory->active_pages, sizeof *check->weights);
    bool whole = check->weights != NULL;
    for (uint32_t v = 0; v < content->vcpus; v++) {
        check->vcpu[v].partial = calloc(memory->active_pages, sizeof *check->vcpu[v].partial);
        whole = whole && check->vcpu[v].partial != NULL;
    }
    if (!whole) {
        check_destroy(check);
        return ENOMEM;
    }
    order_weights(order, check->weights);
    *out = check;
    return 0;
}

int check_vcpu(struct check *check, uint32_t vcpu, uint64_t pass, uint64_t position) {
    if (vcpu >= check->content->vcpus)
        return EINVAL;
    struct visits *visits = &check->vcpu[vcpu];
    visits->pass = pass;
    memset(visits->partial, 0, check->memory->active_pages * sizeof *visits->partial);
    return order_visits(check->order, vcpu, pass, position, visits->partial) ? 0 : EINVAL;
}

void check_destroy(struct check *check) {
    for (uint32_t v = 0; v < check->content->vcpus; v++)
        free(check->vcpu[v].partial);
    free(check->weights);
    free(check);
}

static void page_expected(const struct check *check, uint64_t page, uint64_t *words) {
    const struct content *content = check->content;
    uint64_t base = content_base(content, page);
    page_pattern(content, page, words);
    for (uint32_t v = 0; v < content->vcpus; v++) {
        uint64_t visits = check->vcpu[v].pass * check->weights[page] + check->vcpu[v].partial[page];
        uint64_t *word = &words[content_lane(base, v)];
        if (content->bytes)
            *(uint8_t *)word = (uint8_t)(*(uint8_t *)word + visits);
        else
            *word += visits * content_addend(base, v);
    }
}

/* Reads a hole through its descriptor: a read through the mapping would allocate the page, for shmem and hugetlb.
 * Both show the same page cache. Without a descriptor the memory is private, and a read maps the shared zero page. */
static int hole_read(const struct memory *memory, uint64_t page, void *words) {
    const struct guest_segment *segment = memory->segments;
    uint64_t inside = page;
    for (; inside >= segment->pages; segment++)
        inside -= segment->pages;
    if (segment->fd < 0) {
        memcpy(words, memory_at(memory, page), GUEST_PAGE_BYTES);
        return 0;
    }
    size_t done = 0;
    while (done < GUEST_PAGE_BYTES) {
        ssize_t got = pread(segment->fd, (char *)words + done, GUEST_PAGE_BYTES - done,
                            (off_t)(segment->offset + inside * GUEST_PAGE_BYTES + done));
        if (got < 0 && errno != EINTR)
            return errno;
        if (got == 0)
            return EIO; /* the file ends before the mapping does */
        if (got > 0)
            done += (size_t)got;
    }
    return 0;
}

/* Looks at the lanes of a page that has the right content otherwise: this knows nothing of visits. */
static bool page_descends(const struct check *check, uint64_t page, struct descent *descents) {
    uint64_t base = content_base(check->content, page);
    const uint8_t *memory = memory_at(check->memory, page);
    bool holds = true;
    for (uint32_t v = 0; v < check->content->vcpus; v++) {
        struct descent *descent = &descents[v];
        uint8_t byte = memory[content_lane(base, v) * 8u];
        if (descent->begun && byte != descent->byte) {
            holds = holds && !descent->stepped && byte == (uint8_t)(descent->byte - 1);
            descent->stepped = true;
        }
        descent->begun = true;
        descent->byte = byte;
    }
    return holds;
}

/*
 * Where is there anything in a segment, from page `from` on? [*begin, *end) may hold data, what is before them reads as
 * zeros; both are the segment's end where nothing more is. The file is asked, not read. All of it is data where nobody
 * can tell: memory without a file, and hugetlbfs, which says so itself.
 */
static int segment_seek(const struct guest_segment *segment, uint64_t from, uint64_t *begin, uint64_t *end) {
    *begin = from;
    *end = segment->pages;
    if (segment->fd < 0)
        return 0;
    off_t offset = (off_t)segment->offset;
    off_t data = lseek(segment->fd, offset + (off_t)(from * GUEST_PAGE_BYTES), SEEK_DATA);
    if (data < 0 && errno == ENXIO) {
        struct stat file;
        if (fstat(segment->fd, &file) != 0)
            return errno;
        *begin = segment->pages;
        /* Does it end before the mapping? */
        return (uint64_t)(file.st_size - offset) < segment->pages * GUEST_PAGE_BYTES ? EIO : 0;
    }
    if (data < 0)
        return errno == EINVAL ? 0 : errno; /* a filesystem that knows no holes */
    off_t hole = lseek(segment->fd, data, SEEK_HOLE);
    if (hole < 0)
        return errno;
    uint64_t data_page = (uint64_t)(data - offset) / GUEST_PAGE_BYTES;
    uint64_t hole_page = (uint64_t)(hole - offset) / GUEST_PAGE_BYTES;
    *begin = data_page < segment->pages ? data_page : segment->pages;
    *end = hole_page < segment->pages ? hole_page : segment->pages;
    return 0;
}

static int page_matches(const struct check *check, uint64_t page, struct descent *descents, bool *matches) {
    const struct memory *memory = check->memory;
    uint64_t words[GUEST_PAGE_WORDS];
    if (page < memory->active_pages) {
        page_expected(check, page, words);
        *matches = memcmp(memory_at(memory, page), words, sizeof words) == 0;
        if (*matches && check->content->bytes)
            *matches = page_descends(check, page, descents);
        return 0;
    }
    if (page < memory->active_pages + memory->hole_pages) {
        int problem = hole_read(memory, page, words);
        if (problem != 0)
            return problem;
    } else {
        memcpy(words, memory_at(memory, page), sizeof words);
    }
    uint64_t any = 0;
    for (uint32_t i = 0; i < GUEST_PAGE_WORDS; i++)
        any |= words[i];
    *matches = any == 0;
    return 0;
}

static bool is_chosen(const uint8_t *filter, uint64_t page) {
    return filter == NULL || (filter[page / 8] >> (page % 8) & 1) != 0;
}

static uint64_t count_chosen(const uint8_t *filter, uint64_t first, uint64_t stop) {
    uint64_t count = filter == NULL ? stop - first : 0;
    for (uint64_t page = first; filter != NULL && page < stop; page++)
        count += is_chosen(filter, page);
    return count;
}

static int check_pages(const struct check *check, uint64_t first, uint64_t stop, const uint8_t *filter,
                       struct descent *descents, struct check_result *result) {
    for (uint64_t page = first; page < stop; page++) {
        if (!is_chosen(filter, page))
            continue;
        bool matches = false;
        int problem = page_matches(check, page, descents, &matches);
        if (problem != 0)
            return problem;
        result->pages_checked++;
        if (matches)
            continue;
        if (result->pages_mismatched++ == 0)
            result->first_mismatch = page;
    }
    return 0;
}

/* Pages that are nowhere in the file are what they must be: of millions of them only those that are there are read. */
static int check_holes(const struct check *check, uint64_t first, uint64_t stop, const uint8_t *filter,
                       struct check_result *result) {
    uint64_t base = 0; /* flat page of the segment's first */
    for (const struct guest_segment *segment = check->memory->segments; first < stop; base += segment++->pages) {
        uint64_t segment_stop = base + segment->pages < stop ? base + segment->pages : stop;
        while (first < segment_stop) {
            uint64_t begin, end;
            int problem = segment_seek(segment, first - base, &begin, &end);
            if (problem != 0)
                return problem;
            begin = base + begin < segment_stop ? base + begin : segment_stop;
            end = base + end < segment_stop ? base + end : segment_stop;
            result->pages_checked += count_chosen(filter, first, begin);
            problem = check_pages(check, begin, end, filter, NULL, result);
            if (problem != 0)
                return problem;
            first = end;
        }
    }
    return 0;
}

int check_range(const struct check *check, uint64_t first, uint64_t stop, const uint8_t *filter,
                struct check_result *result) {
    const struct memory *memory = check->memory;
    const uint64_t holes = memory->active_pages, zeroed = holes + memory->hole_pages;
    struct descent descents[GUEST_VCPUS_MAX] = {0};
    *result = (struct check_result){.first_mismatch = UINT64_MAX};
    if (stop > memory->pages)
        return EINVAL;
    int problem = check_pages(check, first, stop < holes ? stop : holes, filter, descents, result);
    if (problem == 0)
        problem = check_holes(check, first > holes ? first : holes, stop < zeroed ? stop : zeroed, filter, result);
    if (problem == 0)
        problem = check_pages(check, first > zeroed ? first : zeroed, stop, filter, descents, result);
    return problem;
}
