// Everything a C++ user may include.
#pragma once

#include "transfuse/control.h"
#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/live_module.h"
#include "transfuse/memory_need.h"
#include "transfuse/model.h"
#include "transfuse/plan.h"
#include "transfuse/publisher.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transfuse/verify.h"
