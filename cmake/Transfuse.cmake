# Rules that every folder follows, so that a folder's CMake is one line in the root list.

add_library(transfuse_flags INTERFACE)
target_compile_options(transfuse_flags INTERFACE
  -Wall -Wextra -Wshadow -Wconversion -Wsign-conversion -Wnon-virtual-dtor
  -Werror=return-type -Werror=unused-result)
if(CMAKE_CXX_COMPILER_ID MATCHES Clang)
  target_compile_options(transfuse_flags INTERFACE -Wthread-safety -Werror=thread-safety)
endif()
if(TRANSFUSE_SANITIZE)
  add_compile_options(
    -fsanitize=${TRANSFUSE_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all)
  add_link_options(-fsanitize=${TRANSFUSE_SANITIZE})
endif()

# transfuse_folder(<path under src> [USES <folders>] [LINK <libraries>] [TEST_USES <folders>])
#   src/<path>/*.cc        -> library tf_<path>
#   src/<path>/*_test.cc   -> test program tf_<path>_test (label unit)
#   src/<path>/*_bench.cc  -> micro-benchmark tf_<path>_bench, also run once, tiny, as a test
function(transfuse_folder path)
  cmake_parse_arguments(arg "" "" "USES;LINK;TEST_USES" ${ARGN})
  string(REPLACE "/" "_" name ${path})
  file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/src/${path}/*.cc)
  set(tests ${sources})
  set(benches ${sources})
  list(FILTER sources EXCLUDE REGEX "_(test|bench)\\.cc$")
  list(FILTER tests INCLUDE REGEX "_test\\.cc$")
  list(FILTER benches INCLUDE REGEX "_bench\\.cc$")
  if(NOT sources)
    add_library(tf_${name} INTERFACE)
    set(scope INTERFACE)
  else()
    add_library(tf_${name} STATIC ${sources})
    target_link_libraries(tf_${name} PRIVATE transfuse_flags)
    set(scope PUBLIC)
  endif()
  target_include_directories(tf_${name} ${scope} ${CMAKE_SOURCE_DIR}/src)
  target_link_libraries(tf_${name} ${scope} transfuse_headers ${arg_LINK})
  foreach(used IN LISTS arg_USES)
    string(REPLACE "/" "_" used_name ${used})
    target_link_libraries(tf_${name} ${scope} tf_${used_name})
  endforeach()
  if(TRANSFUSE_TESTS AND tests)
    list(TRANSFORM arg_TEST_USES REPLACE "/" "_")
    list(TRANSFORM arg_TEST_USES PREPEND tf_)
    transfuse_tests(tf_${name}_test SOURCES ${tests} LINK tf_${name} ${arg_TEST_USES})
  endif()
  if(TRANSFUSE_BENCH AND benches)
    add_executable(tf_${name}_bench ${benches})
    target_link_libraries(tf_${name}_bench PRIVATE
      tf_${name} benchmark::benchmark_main transfuse_flags)
    if(TRANSFUSE_TESTS)
      add_test(NAME bench.tf_${name}_bench COMMAND tf_${name}_bench --benchmark_min_time=0.001)
      set_tests_properties(bench.tf_${name}_bench PROPERTIES
        LABELS bench ENVIRONMENT TRANSFUSE_BENCH_TINY=1)
    endif()
  endif()
endfunction()

# transfuse_tests(<program> SOURCES <files> [LINK <libraries>] [LABELS <labels>] [PREFIX <text>]
#                 [FILTER <tests>])
# A skipped GoogleTest is shown as skipped by ctest. The prefix tells apart the tests of one source
# in several programs.
function(transfuse_tests program)
  cmake_parse_arguments(arg "" "TIMEOUT;PREFIX;FILTER" "SOURCES;LINK;LABELS" ${ARGN})
  if(NOT arg_LABELS)
    set(arg_LABELS unit)
  endif()
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 300)
  endif()
  add_executable(${program} ${arg_SOURCES})
  target_link_libraries(${program} PRIVATE
    ${arg_LINK} GTest::gmock GTest::gtest_main transfuse_flags)
  gtest_discover_tests(${program} DISCOVERY_MODE PRE_TEST TEST_PREFIX "${arg_PREFIX}"
    TEST_FILTER "${arg_FILTER}"
    PROPERTIES LABELS "${arg_LABELS}" TIMEOUT ${arg_TIMEOUT}
               SKIP_REGULAR_EXPRESSION "\\[  SKIPPED \\]")
endfunction()

# src/rpc: the only folder that sees gRPC. Proto files are compiled into the build tree.
function(transfuse_rpc)
  set(out ${CMAKE_BINARY_DIR}/generated)
  file(MAKE_DIRECTORY ${out})
  file(GLOB protos CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/src/rpc/*.proto)
  set(generated)
  foreach(proto IN LISTS protos)
    get_filename_component(stem ${proto} NAME_WE)
    set(files ${out}/${stem}.pb.cc ${out}/${stem}.grpc.pb.cc)
    add_custom_command(OUTPUT ${files} ${out}/${stem}.pb.h ${out}/${stem}.grpc.pb.h
      COMMAND protobuf::protoc --cpp_out=${out} --grpc_out=${out}
              --plugin=protoc-gen-grpc=${GRPC_CPP_PLUGIN} -I ${CMAKE_SOURCE_DIR}/src/rpc ${proto}
      DEPENDS ${proto})
    list(APPEND generated ${files})
  endforeach()
  if(NOT generated)
    return()
  endif()
  add_library(tf_proto STATIC ${generated})
  target_include_directories(tf_proto SYSTEM PUBLIC ${out})
  target_link_libraries(tf_proto PUBLIC protobuf::libprotobuf PkgConfig::GRPC)
  transfuse_folder(rpc USES control LINK tf_proto ${CMAKE_DL_LIBS})
endfunction()

# src/transport/cuda: kernels for every architecture become one image inside the library; the driver
# itself is found when the program runs, so nothing of CUDA is linked.
function(transfuse_cuda)
  set(out ${CMAKE_BINARY_DIR}/generated)
  set(image ${out}/transport/cuda/kernel_image.inc)
  file(MAKE_DIRECTORY ${out}/transport/cuda)
  set(folder ${CMAKE_SOURCE_DIR}/src/transport/cuda)
  file(GLOB headers CONFIGURE_DEPENDS ${folder}/*.h ${CMAKE_SOURCE_DIR}/src/copy/*.h)
  get_filename_component(bin ${CUDAToolkit_NVCC_EXECUTABLE} DIRECTORY)
  add_custom_command(OUTPUT ${image}
    COMMAND ${CUDAToolkit_NVCC_EXECUTABLE} -std=c++20 -O3 -fatbin -Xfatbin -compress-all
            -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90,code=sm_90
            -gencode=arch=compute_100,code=[sm_100,compute_100]
            -I ${CMAKE_SOURCE_DIR}/src -I ${CMAKE_SOURCE_DIR}/include
            -o ${out}/transport/cuda/copy_kernel.fatbin ${folder}/copy_kernel.cu
    COMMAND ${bin}/bin2c --const --name kImage --type longlong
            ${out}/transport/cuda/copy_kernel.fatbin > ${image}
    DEPENDS ${folder}/copy_kernel.cu ${headers} VERBATIM)
  add_custom_target(transfuse_kernel_image DEPENDS ${image})
  transfuse_folder(transport/cuda USES copy LINK ${CMAKE_DL_LIBS} TEST_USES transport/shm)
  add_dependencies(tf_transport_cuda transfuse_kernel_image)
  target_include_directories(tf_transport_cuda SYSTEM PUBLIC ${CUDAToolkit_INCLUDE_DIRS})
  target_include_directories(tf_transport_cuda PRIVATE ${out})
endfunction()
