// Reading beats, and telling the service when a stream has broken.
#include "rpc/streams.h"
#include <memory>
#include <string>
#include <utility>

#include "rpc/service.h"

namespace transfuse {

std::shared_ptr<AttendStream> AttendStream::open(CoordinatorService& service) {
  std::shared_ptr<AttendStream> stream(new AttendStream(service));
  stream->own_self(stream);
  stream->StartRead(&stream->beat_);
  return stream;
}

void AttendStream::OnReadDone(bool ok) {
  if (!ok) {
    service_.detach(this);
    end(grpc::Status::OK);
    return;
  }
  if (const grpc::Status status = service_.beat(this, beat_); !status.ok()) {
    service_.detach(this);
    end(status);
    return;
  }
  StartRead(&beat_);
}

// A broken connection shows here and as a failed read; whichever comes first counts.
void AttendStream::OnCancel() { service_.detach(this); }

std::shared_ptr<WatchStream> WatchStream::open(CoordinatorService& service, std::string model) {
  std::shared_ptr<WatchStream> stream(new WatchStream(service, std::move(model)));
  stream->own_self(stream);
  return stream;
}

void WatchStream::add(const wire::Version& version) {
  if (!model_.empty() && version.model() != model_) return;
  enqueue(version, [&](const wire::Version& other) {
    return other.version() == version.version() && other.model() == version.model();
  });
}

void WatchStream::OnCancel() {
  service_.detach(this);
  end(grpc::Status::CANCELLED);
}

}  // namespace transfuse
