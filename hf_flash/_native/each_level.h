// Includes the file that LOOPS names once for each instruction set, in the namespaces v4, v3 and plain: see CALL.

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace {
namespace v4 {
#define LEVEL 4
#include LOOPS
#undef LEVEL
}  // namespace v4
}  // namespace
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace {
namespace v3 {
#define LEVEL 3
#include LOOPS
#undef LEVEL
}  // namespace v3
}  // namespace
#pragma GCC pop_options
#endif

namespace {
namespace plain {
#define LEVEL 1
#include LOOPS
#undef LEVEL
}  // namespace plain
}  // namespace
