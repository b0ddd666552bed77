// The least that an ext_proc server can do, natively: names a cluster for every request, waves response headers
// through, and keeps the stream open to its end. What `make bench-transport` measures ours against.
//
//     noop ADDRESS CLUSTER
#include <grpcpp/grpcpp.h>

#include <iostream>
#include <memory>
#include <string>

#include "ext_proc.grpc.pb.h"

namespace ep = envoy::service::ext_proc::v3;

namespace {

ep::ProcessingResponse Steer(const std::string& cluster) {
  ep::ProcessingResponse response;
  auto* common = response.mutable_request_headers()->mutable_response();
  auto* option = common->mutable_header_mutation()->add_set_headers();
  option->mutable_header()->set_key("x-upstream-cluster");
  option->mutable_header()->set_raw_value(cluster);
  option->set_append_action(ep::HeaderValueOption::OVERWRITE_IF_EXISTS_OR_ADD);
  common->set_clear_route_cache(true);
  return response;
}

class Stream : public grpc::ServerBidiReactor<ep::ProcessingRequest, ep::ProcessingResponse> {
 public:
  explicit Stream(const ep::ProcessingResponse* steer) : steer_(steer) { StartRead(&request_); }

  void OnReadDone(bool ok) override {
    if (!ok) {
      Finish(grpc::Status::OK);
    } else if (request_.has_request_headers()) {
      StartWrite(steer_);
    } else {
      response_.mutable_response_headers();
      StartWrite(&response_);
    }
  }
  void OnWriteDone(bool ok) override {
    if (ok) {
      request_.Clear();
      StartRead(&request_);
    } else {
      Finish(grpc::Status::OK);
    }
  }
  void OnDone() override { delete this; }

 private:
  const ep::ProcessingResponse* steer_;
  ep::ProcessingRequest request_;
  ep::ProcessingResponse response_;
};

class Service : public ep::ExternalProcessor::CallbackService {
 public:
  explicit Service(const std::string& cluster) : steer_(Steer(cluster)) {}

  grpc::ServerBidiReactor<ep::ProcessingRequest, ep::ProcessingResponse>* Process(
      grpc::CallbackServerContext*) override {
    return new Stream(&steer_);
  }

 private:
  const ep::ProcessingResponse steer_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: noop ADDRESS CLUSTER\n";
    return 2;
  }
  Service service(argv[2]);
  grpc::ServerBuilder builder;
  builder.AddListeningPort(argv[1], grpc::InsecureServerCredentials());
  builder.AddChannelArgument("grpc.max_concurrent_streams", 2147483647);
  builder.RegisterService(&service);
  std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr) return 1;
  std::cout << "serving" << std::endl;
  server->Wait();
}
