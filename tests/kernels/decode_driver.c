/* Runs one call of `minipeft_decode` whose tensors come from standard input, so that the compiled part can be tried on a
 * processor that is emulated. In: the call's 16 numbers, with sizes in bytes where addresses were; the tensors. Out: the
 * processor's level (4 bytes), what was decoded. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int minipeft_level(void);
void minipeft_decode(const int64_t *call);

int check_products(void);

int main(int count, char **arguments) {
    (void)arguments;
    if (count > 1)
        return check_products();
    int64_t call[16];
    if (fread(call, 8, 16, stdin) != 16)
        return 1;
    for (int i = 0; i < 6; i++) {
        int64_t bytes = call[i];
        void *tensor = bytes ? malloc(bytes) : NULL;
        if (bytes && (!tensor || fread(tensor, 1, bytes, stdin) != (size_t)bytes))
            return 2;
        call[i] = (int64_t)tensor;
    }
    int64_t bytes = call[12];
    void *out = malloc(bytes ? bytes : 1);
    call[12] = (int64_t)out;
    int32_t level = minipeft_level();
    call[14] = call[14] < level ? call[14] : level;
    minipeft_decode(call);
    return fwrite(&level, 4, 1, stdout) == 1 && fwrite(out, 1, bytes, stdout) == (size_t)bytes ? 0 : 3;
}
